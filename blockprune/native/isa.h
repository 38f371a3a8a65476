// Instruction sets: which ones this processor has, and how a part of a file is compiled for one of them.

#pragma once

#include <cstdint>
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#endif

// The numbers are positions in INSTRUCTIONS of library.py; there, -1 stands for the best one.
enum Isa : int32_t { BEST = -1, PLAIN, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AMX, ISA_COUNT };

#if (defined(__x86_64__) || defined(__aarch64__)) && (defined(__GNUC__) || defined(__clang__)) && !defined(WITHOUT_VECTORS)
#define HAS_VECTORS  // the vector extension of gcc and clang
#endif

// BEGIN_TARGET(TARGET_AVX2) ... END_TARGET compile the functions between them for an instruction set. Headers of the standard library come
// before it, and its larger function templates are not used within: the linker would share them with code for other processors.
#if defined(__x86_64__) && defined(HAS_VECTORS) && !defined(PLAIN_VECTORS_ALONE)
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(NAMES) PRAGMA(clang attribute push(__attribute__((target(NAMES))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(NAMES) PRAGMA(GCC push_options) PRAGMA(GCC target(NAMES))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#endif
#define TARGET_AVX2 "avx2,fma"
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11)
#define TARGET_AVX_VNNI "avx2,fma,avxvnni"
#endif
#define TARGET_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define TARGET_AVX512_VNNI "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512vnni"
#define TARGET_AVX512_BF16 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16,avx512vnni"  // processors with one have both

static inline bool processor_has(Isa isa) {
#if defined(BEGIN_TARGET)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == AVX2) return avx2;
    if (isa == AVX_VNNI) {  // not all compilers know its name in __builtin_cpu_supports
        unsigned a = 0, b = 0, c = 0, d = 0;
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    }
    if (isa == AVX512) return avx512;
    if (isa == AVX512_VNNI) return avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (isa == AVX512_BF16) return bf16;
    if (isa == AMX) {  // tiles, of bfloat16 and of int8
        unsigned a = 0, b = 0, c = 0, d = 0;
        const unsigned needed = 1u << 24 | 1u << 22 | 1u << 25;
        return bf16 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed;
    }
#endif
    return isa == PLAIN;
}

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif
// Without this gcc would load a vector from memory again for each multiplication.
#if defined(__x86_64__) && defined(HAS_VECTORS)
#define IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__aarch64__) && defined(HAS_VECTORS)
#define IN_REGISTER(v) asm("" : "+w"(v))
#else
#define IN_REGISTER(v)
#endif
