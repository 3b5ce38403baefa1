"""What the kernels need to know about TPU generations, per JAX device. Nothing here was measured by us.

HBM bandwidth, bf16 peak and VMEM are the vendor's published figures (cloud.google.com/tpu/docs). Clocks are
not published: they follow from peak / (matrix units x rows x columns x 2), and agree
with the compiler's own cycle counts of copies. The HBM that a program may use is a little less than the
published 16, 95, 32 and 192 GB a chip: it is what libtpu 0.0.42's compiler names when a program is too large
("exceeds available HBM (31.25G)"). Rates of links: `sharding.dispatch_cost.LINKS`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One JAX device: a chip, on tpu7x one of its two cores."""

    clock_hz: float
    hbm_bytes_per_second: float
    bf16_flops: float  # per second
    vmem_bytes: int  # per core
    hbm_bytes: int = 0  # that a program may use
    devices: int = 1  # JAX devices of a chip, which is what is rented
    torus: int = 2  # dimensions of its slices

    def seconds(self, flops: float, hbm_bytes: float) -> float:
        """The roofline: the slower of arithmetic at peak and traffic at full bandwidth."""
        return max(flops / self.bf16_flops, hbm_bytes / self.hbm_bytes_per_second)


CHIPS = {
    "v5e": Chip(1.50e9, 819e9, 197e12, 128 * 2**20, int(15.75 * 2**30)),
    "v5p": Chip(1.75e9, 2765e9, 459e12, 64 * 2**20, int(95.74 * 2**30), torus=3),
    "v6e": Chip(1.75e9, 1640e9, 918e12, 128 * 2**20, int(31.25 * 2**30)),
    "tpu7x": Chip(2.20e9, 3690e9, 1153.5e12, 64 * 2**20, int(94.75 * 2**30), devices=2, torus=3),
}
