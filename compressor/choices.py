"""What can be chosen by name, each list once: light, so that a command line can show it before anything is imported."""

from __future__ import annotations

from typing import Literal

FormRequest = Literal["auto", "plain", "pivoted"]
# What decides between forms, and whether a pair is worth its place.
Preference = Literal["speed", "size"]
Effort = Literal["fast", "balanced", "best"]
# What may stand in the place of calibration data: examples that the model makes itself, or no calibration.
NoData = Literal["self", "none"]
BuiltinData = Literal["builtin:digits", "builtin:stdlib"]
Split = Literal["train", "validation", "test"]
# Whose names the tensors of an adapter have.
AdapterDialect = Literal["peft", "kohya", "diffusers"]
ExportTarget = Literal["dense", "hf-remote", "onnx", "gguf", "lora", "peft", "kohya", "diffusers"]
# A shell whose completion is installed; auto is the one that runs the command.
Shell = Literal["auto", "bash", "zsh", "fish", "powershell", "pwsh"]
MergeMode = Literal["sum", "concat"]
Head = Literal["shared", "separate"]
