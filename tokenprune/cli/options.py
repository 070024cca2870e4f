"""Arguments and options that several commands take."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, TypeAlias

import typer


class Dtype(str, Enum):
    """Of the weights; auto is what the checkpoint has."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A local folder, a hub id, or 'small' or 'smol': the testbed's."),
]
DataOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="A folder of images, a .jsonl file (image, prompt), hf:OWNER/NAME, or 'testbed'.",
    ),
]
DtypeOption: TypeAlias = Annotated[Dtype, typer.Option("--dtype", help="Of the weights.")]
DeviceOption: TypeAlias = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, or auto to spread over GPUs.")
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else.")
]
MinPixels: TypeAlias = Annotated[
    int | None,
    typer.Option("--min-pixels", min=1, help="Scale pictures up to these (Qwen-VL, GLM-V and their kin)."),
]
MaxPixels: TypeAlias = Annotated[
    int | None, typer.Option("--max-pixels", min=1, help="Scale pictures down to these (likewise).")
]
Side: TypeAlias = Annotated[
    int | None,
    typer.Option("--size", min=1, help="Longest side of pictures, in pixels (Pixtral, Idefics3, SmolVLM)."),
]
MetricOption: TypeAlias = Annotated[
    str, typer.Option("--metric", help="Drift: cosine, relative_l2, kl or cauchy_schwarz.")
]
