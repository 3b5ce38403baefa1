"""What a checkpoint's headers and config say, checked against each other before data is read."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.expected import StoredTensor, check_tensor, missing_problems, unexpected_problems
from dsv4_jax.checkpoint.files import CheckpointFiles, open_tensors
from dsv4_jax.checkpoint.recognise import DraftHead, identify, recognise
from dsv4_jax.checkpoint.side_files import SideFiles, UseTokenizer, read_side_files
from dsv4_jax.config import ModelConfig
from dsv4_jax.config.io import CONFIG_FILE, ConfigFile, read_config_in
from dsv4_jax.errors import CheckpointError, ConfigError
from dsv4_jax.reading.folder import Folder
from dsv4_jax.reading.foreign import foreign_folder

# A config may claim this many times the tensors that are there, and some more, before the claim is refused
# as a whole instead of being listed tensor by tensor.
_CLAIM_FACTOR, _CLAIM_SLACK = 4, 10_000


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller accepts in a checkpoint; see `load_checkpoint`."""

    draft_head: DraftHead = "load"
    text_only: bool = False
    require_mtp: bool = False
    copy: bool = False
    allow_links: str | pathlib.Path | None = None
    tokenizer: UseTokenizer = "read"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checkpoint whose headers and config agree.

    Attributes:
        config: of the model that its tensors make; without MTP block where it has none.
        layout: its naming.
        tensors: one for each tensor of that layout, in the order of the rename table.
        warnings: what was left out, and disagreements that the tensors settle.
        side_files: the small files beside the weights.
    """

    config: ModelConfig
    layout: names.Layout
    tensors: tuple[StoredTensor, ...]
    warnings: tuple[str, ...]
    side_files: SideFiles


@contextlib.contextmanager
def open_manifest(
    directory: str | pathlib.Path, options: Options
) -> Iterator[tuple[CheckpointFiles, Manifest]]:
    """Opens a checkpoint directory and checks all that can be known without its data.

    Raises:
        CheckpointError: every problem of config, files, names, shapes and dtypes at once.
    """
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder(directory, options.allow_links))
        if foreign := foreign_folder(folder.names):
            raise folder.refused([foreign])
        config_file = files = None
        try:
            config_file = read_config_in(folder, text_only=options.text_only)
        except CheckpointError as error:
            problems += error.problems
        except ConfigError as error:
            problems += [f"{CONFIG_FILE}: {problem}" for problem in error.problems]
        vocab_size = None if config_file is None else config_file.config.vocab_size
        side_files, found = read_side_files(folder, vocab_size, options.tokenizer)
        problems += found
        try:
            files = stack.enter_context(open_tensors(folder, copy=options.copy))
        except CheckpointError as error:
            problems += error.problems
        manifest = None
        if config_file is not None and files is not None:
            manifest, found = build_manifest(files, config_file, side_files, options)
            problems += found
        if manifest is None or problems:
            raise folder.refused(problems)
        yield files, manifest


def build_manifest(
    files: CheckpointFiles, config_file: ConfigFile, side_files: SideFiles, options: Options
) -> tuple[Manifest | None, list[str]]:
    """Matches the tensors of the files with those of the config.

    Returns:
        (manifest, problems), the manifest None if there is any problem.
    """
    headers = files.tensors
    recognised = recognise(
        headers,
        has_dspark=config_file.has_dspark,
        draft_head=options.draft_head,
        text_only=options.text_only,
        require_mtp=options.require_mtp,
    )
    if recognised.refusals:
        return None, recognised.refusals
    naming = identify(recognised.names)
    problems = list(naming.problems)
    if naming.layout is None:
        problems += unexpected_problems(naming.unknown, "official", config_file.config)
        return None, problems

    config = config_file.config
    if recognised.has_dspark or naming.layout != "official":
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    left_out = []
    if config.dspark is not None and (options.draft_head == "ignore" or naming.layout != "official"):
        config = dataclasses.replace(config, dspark=None)
        if options.draft_head != "ignore":
            left_out = [f"config.json describes a DSpark draft head; the {naming.layout} layout holds none"]
    if options.require_mtp and config.num_nextn_predict_layers == 0:
        problems.append(f"an MTP block was asked for; this checkpoint ({naming.layout} layout) has none")

    claimed, most = names.num_tensors(config, naming.layout), _CLAIM_FACTOR * len(headers) + _CLAIM_SLACK
    if claimed > most:
        problems.append(
            f"{CONFIG_FILE} describes {claimed} tensors (num_hidden_layers={config.num_hidden_layers},"
            f" n_routed_experts={config.n_routed_experts}), the files hold {len(headers)}"
        )
        return None, problems
    specs = names.layout_tensors(config, naming.layout)
    known = {spec.name for spec in specs} | {spec.scale_name for spec in specs}
    problems += missing_problems(specs, naming.names)
    unexpected = [own for own in naming.names if own not in known] + naming.unknown
    problems += unexpected_problems(unexpected, naming.layout, config)
    matched: list[StoredTensor] = []
    for spec in specs:
        scale_file_name = naming.names.get(spec.scale_name or "")
        scale = None if scale_file_name is None else headers[scale_file_name]
        if spec.name in naming.names:
            tensor, found = check_tensor(spec, headers[naming.names[spec.name]], scale)
            problems += found
            matched += [tensor] if tensor is not None else []
        elif scale is not None:
            problems.append(f"{scale.path.name}: {scale.name}: scales without their weights")
    if problems:
        return None, problems
    warnings = [*files.warnings, *config_file.notes, *recognised.warnings, *left_out]
    warnings += storage_warnings(matched, config_file.raw)
    return Manifest(config, naming.layout, tuple(matched), tuple(dict.fromkeys(warnings)), side_files), []


def storage_warnings(tensors: list[StoredTensor], raw: Mapping[str, object]) -> list[str]:
    """Where the config's words about storage and the tensors disagree: the tensors are believed."""
    warnings = []
    experts = [tensor for tensor in tensors if tensor.spec.parameter.role == "expert"]
    layers: dict[object, dict[str, str]] = {}
    for tensor in experts:
        # spec.index[:1] is the repeat of the stack: with the path's head, one layer
        place = (tensor.spec.path[:4], tensor.spec.index[:1])
        layers.setdefault(place, {}).setdefault(tensor.info.dtype, tensor.info.name)
    for found in layers.values():
        if len(found) > 1:
            said = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
            warnings.append(f"the experts of one layer are stored in different dtypes: {said}")
    formats = {tensor.format for tensor in experts}
    stated = raw.get("expert_dtype")
    quantization = raw.get("quantization_config")
    if isinstance(quantization, Mapping):
        stated = stated or quantization.get("expert_dtype")
    if stated is not None and formats != {stated if stated in ("fp4", "fp8") else "plain"}:
        warnings.append(
            f"config.json says expert_dtype={stated!r}, the tensors are"
            f" {' and '.join(sorted(formats))}; the tensors are believed"
        )
    quantized = any(tensor.format != "plain" for tensor in tensors)
    if quantized != isinstance(quantization, Mapping):
        warnings.append(
            f"config.json {'has no' if quantized else 'has a'} quantization_config, the tensors are"
            f" {'quantised' if quantized else 'not'}; the tensors are believed"
        )
    return warnings
