"""Arguments that several subcommands share."""

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
