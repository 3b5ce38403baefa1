"""Options that several subcommands share."""

import pathlib
from typing import Annotated

import tyro

Checkpoint = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="CHECKPOINT", help="directory, or hf://org/name@revision"),
]
CompilationCache = Annotated[
    bool, tyro.conf.arg(help="keep compiled programs under ~/.cache/dsv4_jax/compiled")
]
AllowLinks = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(metavar="DIR", help="accept links of CHECKPOINT that lead into this directory"),
]
Mesh = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="AXIS=SIZE,...", help="devices to spread the model over, such as expert=8,tensor=2"
    ),
]
Json = Annotated[bool, tyro.conf.arg(name="json", help="print one JSON object")]
