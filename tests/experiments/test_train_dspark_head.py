"""What the head is trained on is what it does when it serves."""

import jax
import numpy as np
import pytest

from dsv4_jax.inference import steps
from dsv4_jax.inference.sampling import request_keys
from experiments.train_dspark_head import slot_losses
from tests.serving.test_machine import V, model


@pytest.mark.parametrize("anchor", [0, 2, 11])  # the first token, less than a window of 4, more
def test_a_slot_is_trained_on_the_scores_that_it_drafts_from(anchor):
    lm = model("dspark")
    tokens = np.random.default_rng(1).integers(0, V, (1, 24)).astype(np.int32)
    head = lm.parameters["dspark"]
    backbone = {name: tree for name, tree in lm.parameters.items() if name != "dspark"}
    anchors = np.array([[anchor]], np.int32)
    total, parts = jax.jit(slot_losses, static_argnums=0)(lm.network, head, backbone, tokens, anchors)
    cache = lm.new_cache(1, 32, dspark=True)
    padded = np.zeros((1, 16), np.int32)
    padded[0, : anchor + 1] = tokens[0, : anchor + 1]
    _, cache = lm.extend(cache, padded, [anchor + 1])
    drawing = request_keys(0, 1), np.zeros(1, np.float32), np.ones(1, np.float32)
    _, scores, confidences = steps.draft_block(
        lm.network, lm.parameters, cache, tokens[:, anchor + 1], *drawing
    )
    scores = np.asarray(jax.nn.log_softmax(scores, axis=-1), np.float64)[0, 0]
    np.testing.assert_allclose(parts["cross_entropy"][0], -scores[tokens[0, anchor + 2]], rtol=1e-4)
    # The backbone's own scores there: of the prefix that ends with the anchor's next token.
    own = jax.nn.log_softmax(lm.logits(tokens[:, : anchor + 2])[0, -1])
    wanted, draft = np.exp(np.asarray(own, np.float64)), np.exp(scores)
    np.testing.assert_allclose(parts["l1"][0], np.abs(wanted - draft).sum(), rtol=1e-3)
    chance, logit = np.minimum(wanted, draft).sum(), float(confidences[0, 0])
    crossed = -chance * -np.log1p(np.exp(-logit)) - (1 - chance) * -np.log1p(np.exp(logit))
    np.testing.assert_allclose(parts["confidence"][0], crossed, rtol=1e-3)
    assert np.isfinite(float(total))
