#!/usr/bin/env bash
# Make the environments .peers/nni28, nni30, torchao, llmcompressor and engines in the repository root. It can be run again.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

# NNI is installed without its dependencies: the versions that it pins do not work with this torch, and pruning needs only these packages.
common="torch==2.13.0 numpy==2.2.6 astor==0.8.1 cloudpickle==3.1.2 colorama==0.4.6 json-tricks==3.17.3 prettytable==3.18.0
    psutil==7.2.2 pyyaml==6.0.3 requests==2.34.2 schema==0.7.8 typeguard==4.1.2"

peer() { # peer NAME NNI-VERSION IMPORT-TO-CHECK [REQUIREMENT...]
    local home=.peers/$1 version=$2 check="import nni; assert nni.__version__ == '$2'; import $3"
    shift 3
    if [ -x "$home/bin/python" ] && "$home/bin/python" -c "$check" >/dev/null 2>&1; then
        echo "$home: in place"
        return
    fi
    "$python" -m venv --clear "$home"
    # shellcheck disable=SC2086 # $common is a list of words
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check $common "$@"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "nni==$version"
    "$home/bin/python" -c "$check"
    echo "$home: made"
}

peer nni28 2.8 nni.algorithms.compression.v2.pytorch.pruning.tools tensorboard==2.21.0
peer nni30 3.0 nni.compression.pruning scipy==1.17.1

other() { # other NAME CHECK PIP-ARGUMENT...
    local home=.peers/$1 check=$2
    shift 2
    if [ -x "$home/bin/python" ] && "$home/bin/python" -c "$check" >/dev/null 2>&1; then
        echo "$home: in place"
        return
    fi
    "$python" -m venv --clear "$home"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    "$home/bin/python" -c "$check" 2>/dev/null
    echo "$home: made"
}

# torchao 0.18 is its last release with sparsity. llm-compressor pins many packages, so llmcompressor.txt lists all of them.
other torchao "from torchao.sparsity import WandaSparsifier" torch==2.13.0 numpy==2.2.6 torchao==0.18.0
other llmcompressor "from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier" -r benchmarks/peers/llmcompressor.txt
# The last release of DeepSparse needs Python 3.11 and these versions.
other engines "import onnxruntime, openvino" torch==2.13.0 numpy==1.26.4 onnx==1.14.1 onnxruntime==1.32.0 openvino==2026.4.1 deepsparse==1.8.0
