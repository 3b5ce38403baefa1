"""Head product and cross entropy as one operation: the logits never exist as a whole."""

from pallas_kernels.linear_cross_entropy.op import linear_cross_entropy as linear_cross_entropy
from pallas_kernels.linear_cross_entropy.op import weighted_cross_entropy as weighted_cross_entropy
from pallas_kernels.linear_cross_entropy.reference import (
    linear_cross_entropy_reference as linear_cross_entropy_reference,
)
