"""Copied into the environment of `make vllm` as sitecustomize.py: torchvision has no build beside
torch's CPU build and fails at import, unless two of its operators were declared before."""

import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
