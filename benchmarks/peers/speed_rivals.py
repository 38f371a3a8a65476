"""Other inference engines on one layer with pruned blocks: does sparsity make them faster? It runs in the environment of setup.sh.

.peers/engines/bin/python benchmarks/peers/speed_rivals.py [--shape 4096 4096] [--batch 128] [--sparsities 0.75 0.9]

The engines run in turn on one thread. The table shows median milliseconds, and the speed as a multiple of torch's F.linear in the same run.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper, numpy_helper

try:
    import deepsparse
except ImportError:  # its last release needs Python 3.11
    deepsparse = None

BLOCKS = ((16, 1), (32, 32))


def model(weight, batch, path):
    """Save one MatMul as an ONNX file and return its path."""
    cols, rows = weight.shape[1], weight.shape[0]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, rows])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.numpy().T), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def engines(weight, x, folder, name):
    path, data = model(weight, len(x), Path(folder) / f"{name}.onnx"), x.numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    exact = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    calls = {"onnxruntime": lambda: session.run(None, {"x": data})[0], "OpenVINO": lambda: compiled(data)[0]}
    if deepsparse is not None:
        engine = deepsparse.compile_model(path, batch_size=len(x), num_cores=1)
        calls["DeepSparse"] = lambda: engine.run([data])[0]
    return calls


def main(options):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, cols = options.shape
    weight, x = torch.randn(rows, cols), torch.randn(options.batch, cols)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        calls = {("dense", 0.0, name): call for name, call in engines(weight, x, folder, "dense").items()}
        calls["dense", 0.0, "torch F.linear"] = lambda: torch.nn.functional.linear(x, weight)
        for block in BLOCKS:
            for sparsity in options.sparsities:
                keep = torch.rand(rows // block[0], cols // block[1]) >= sparsity  # [R, C]
                pruned = weight * keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                blocks = f"{block[0]}x{block[1]}"
                for name, call in engines(pruned, x, folder, f"{blocks}-{sparsity}").items():
                    calls[blocks, sparsity, name] = call
                stored = pruned.to_sparse_bsr(block) if block[1] > 1 else pruned.to_sparse_csr()
                name = "torch BSR" if block[1] > 1 else "torch CSR"
                calls[blocks, sparsity, name] = lambda stored=stored: torch.nn.functional.linear(x, stored)
        seconds = {key: [] for key in calls}
        for call in calls.values():
            call()
        for _ in range(options.rounds):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[key].append(time.perf_counter() - start)
    base = statistics.median(seconds["dense", 0.0, "torch F.linear"])
    print(
        f"{rows}x{cols}, batch {options.batch}, float32, one thread; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, ",
        end="",
    )
    print(f"OpenVINO {openvino.__version__.split('-')[0]}, DeepSparse {deepsparse.__version__ if deepsparse else 'not installed'}")
    print(f"{'blocks':8}{'pruned':>8}  {'engine':16}{'ms':>9}{'x F.linear':>12}")
    for (blocks, sparsity, name), times in seconds.items():
        s = statistics.median(times)
        print(f"{blocks:8}{sparsity:>8.0%}  {name:16}{1e3 * s:>9.2f}{base / s:>12.2f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())
