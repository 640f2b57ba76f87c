"""Features that are kept on the way: whole parts, whoever wrote them."""

import torch

from madformer.evaluation.feature_cache import INDICES, read_indices, read_parts, remove_parts, write_part


def test_parts_are_read_in_the_order_of_their_samples(tmp_path):
    folder = tmp_path / "features"
    for indices in ([30, 31], [2, 10], [4]):
        write_part(folder, {INDICES: torch.tensor(indices), "features": torch.tensor(indices)[:, None].float()})
    assert read_indices(folder) == {2, 4, 10, 30, 31}
    assert [part["features"].flatten().tolist() for part in read_parts(folder)] == [[2, 10], [4], [30, 31]]
    remove_parts(folder)
    assert not folder.exists() and read_indices(folder) == set()
    remove_parts(folder)


def test_a_torn_part_is_as_if_it_were_not_there(tmp_path):
    for index in (0, 1):
        write_part(tmp_path, {INDICES: torch.tensor([index]), "features": torch.ones(1, 3)})
    torn = sorted(tmp_path.iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:40])
    assert read_indices(tmp_path) == {1}
    assert not torn.exists(), "what is sampled again must not meet it"
