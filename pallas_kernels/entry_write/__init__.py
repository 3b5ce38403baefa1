"""New entries into a stack of them, in place."""

from pallas_kernels.entry_write.op import write_entries as write_entries
from pallas_kernels.entry_write.reference import write_entries_reference as write_entries_reference
