"""What is read from the text of a compiled program."""

from experiments.muon_exchange import collectives

TEXT = """
  %a = bf16[32,6,128]{2,1,0:T(8,128)(2,1)} all-to-all(%b), channel_id=1
  %c = (f32[4,2]{1,0}, f32[4,2]{1,0}) all-to-all-start(%d), channel_id=2
  %e = f32[] all-reduce(%f), to_apply=%add
  %g = f32[4,2]{1,0} all-to-all-done(%c)
"""


def test_every_collective_is_found_once():
    found = [(each["name"], each["dtype"], each["shape"]) for each in collectives(TEXT)]
    assert found == [
        ("all-to-all", "bf16", [32, 6, 128]),
        ("all-to-all", "f32", [4, 2]),
        ("all-reduce", "f32", []),
    ]
    assert collectives(TEXT)[0]["mib"] == round(32 * 6 * 128 * 2 / 2**20, 3)
