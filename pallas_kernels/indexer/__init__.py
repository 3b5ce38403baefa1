"""The lightning indexer: scores of compressed entries, and the exact choice of the best k."""

from pallas_kernels.indexer.chosen_list import index_list as index_list
from pallas_kernels.indexer.op import index_scores as index_scores
from pallas_kernels.indexer.op import index_select as index_select
