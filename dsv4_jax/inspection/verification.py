"""What `dsv4 verify` says about a checkpoint, for people and for programs."""

from dsv4_jax.checkpoint.verify import Verification


def as_plain(found: Verification) -> dict[str, object]:
    """JSON-ready values."""
    return {
        "sound": found.sound,
        "problems": list(found.problems),
        "warnings": list(found.warnings),
        "layout": found.layout,
        "num_tensors": found.num_tensors,
        "num_bytes": found.num_bytes,
        "formats": dict(found.formats),
        **({} if found.bytes_a_device is None else {"bytes_a_device": found.bytes_a_device}),
    }


def lines(found: Verification) -> list[str]:
    """A few lines of text; the problems themselves are the error message."""
    said = [f"warning: {warning}" for warning in found.warnings]
    if not found.sound:
        return [*said, f"unsound: {len(found.problems)} problems"]
    formats = ", ".join(f"{count} {name}" for name, count in sorted(found.formats.items()))
    said.append(
        f"sound: {found.num_tensors} tensors, {found.num_bytes:,} bytes, {found.layout} names"
        f" ({formats} weights)"
    )
    if found.bytes_a_device is not None:
        said.append(f"spread as asked, every device would hold {found.bytes_a_device:,} bytes of parameters")
    return said
