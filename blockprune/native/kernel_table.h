// The table of the kernels for one instruction set. Included last, in its namespace.

constexpr Kernels kernels = {{pool_part<IDENTITY, float>, pool_part<ABS, float>, pool_part<SQUARE, float>},
                         {pool_part<IDENTITY, bf16>, pool_part<ABS, bf16>, pool_part<SQUARE, bf16>},
                         {sweep_sizes<float>, sweep<float>},
                         {sweep_sizes<double>, sweep<double>}};
