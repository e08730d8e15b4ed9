"""Recalls from an explicit map, with several captions or pictures each; a search that holds blocks alone."""

import pytest
import torch
from wukong_parts import unit

from lightning_t2i.errors import UserError
from lightning_t2i.metrics.retrieval import RetrievalRecall, TopK, belonging, recalls, search, summary
from lightning_t2i.processes.similarity import token_similarity


def cosine(images, texts):
    there = images @ texts.T
    return there, there.T


def test_recalls_count_any_own_candidate():
    top = torch.tensor([[3, 0, 2], [1, 2, 3], [2, 3, 1]])
    pairs = torch.tensor([[0, 0], [0, 2], [1, 1]])  # query 2 has none and does not count
    assert recalls(top, pairs, 4, (1, 2, 3)) == [0.5, 1.0, 1.0]
    assert recalls(top, torch.tensor([[2, 0]]), 4, (1, 3)) == [0.0, 0.0]


def test_the_search_in_blocks_is_the_whole_sort():
    images, texts = unit(23, 4, dtype=torch.float32), unit(31, 4, seed=1, dtype=torch.float32)
    to_text, to_image = search(cosine, images, texts, k=5, block=7)
    whole = images @ texts.T
    assert torch.equal(to_text.indices, whole.topk(5).indices)
    assert torch.equal(to_image.indices, whole.T.topk(5).indices)
    torch.testing.assert_close(to_text.values, whole.topk(5).values)


def test_equal_scores_keep_the_earlier_candidate():
    top = TopK(1, 2)
    top.add(torch.tensor([[0.5, 0.5]]), slice(0, 1), 0)
    top.add(torch.tensor([[0.5, 0.7]]), slice(0, 1), 2)
    assert top.indices.tolist() == [[3, 0]]


def test_fewer_candidates_than_places_are_no_hits():
    to_text, to_image = search(cosine, unit(2, 3, dtype=torch.float32), unit(2, 3, dtype=torch.float32))
    assert to_text.indices.shape == (2, 10) and bool((to_text.indices[:, 2:] == -1).all())
    assert summary(to_text.indices, to_image.indices, torch.tensor([[0, 0], [1, 1]]))["mean"] == 1.0


def test_several_captions_of_a_picture_are_all_its_own():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [0, 1.0, 0], [0, 1.0, 0.9]])
    recall = RetrievalRecall()
    recall.add(images[:2], torch.tensor([70, 80]), texts[:3], torch.tensor([70, 70, 80]))
    recall.add(images[2:], torch.tensor([90]), texts[3:], torch.tensor([90]))
    found = recall.compute(cosine)
    assert found["i2t/r1"] == pytest.approx(1.0)
    assert found["t2i/r1"] == pytest.approx(3 / 4)  # the last text is nearer to the second picture
    assert found["t2i/r5"] == 1.0
    assert found["mean"] == pytest.approx((1 + (3 / 4 + 1 + 1) / 3) / 2)
    recall.reset()
    with pytest.raises(UserError, match="No picture"):
        recall.compute(cosine)


def test_a_query_with_several_pictures_is_found_by_any():
    to_image = torch.tensor([[5, 1], [0, 2]])
    pairs = torch.tensor([[1, 0], [4, 0], [3, 1]])  # (picture, query): query 0 has pictures 1 and 4
    assert summary(torch.full((6, 2), -1), to_image, pairs)["t2i/r5"] == 0.5


def test_equal_queries_are_one_that_any_of_its_pictures_answers():
    images, same = torch.eye(3), torch.tensor([1.0, 0.1, 0])
    texts, owners = torch.stack([same, same, torch.eye(3)[2]]), torch.tensor([7, 8, 9])
    asked, merged = RetrievalRecall(), RetrievalRecall()
    asked.add(images, owners, texts, owners)
    merged.add(images[:1], owners[:1], texts[:1], owners[:1], ["a"])
    merged.add(images[1:], owners[1:], texts[1:], owners[1:], ["a", "b"])
    assert asked.compute(cosine)["t2i/r1"] == pytest.approx(2 / 3)  # one of the two asks for the other picture
    assert merged.compute(cosine)["t2i/r1"] == 1.0
    assert merged.compute(cosine)["i2t/r1"] == 1.0


def test_texts_without_their_picture_belong_to_none():
    pictures, texts = belonging(torch.tensor([5, 2, 9]), torch.tensor([9, 3, 5, 9, 11]), torch.arange(5))
    assert torch.stack([pictures, texts], 1).tolist() == [[2, 0], [0, 2], [2, 3]]


def test_token_wise_ways_are_not_each_others_transpose():
    images, texts = unit(6, 3, 4, dtype=torch.float32), unit(8, 5, 4, seed=2, dtype=torch.float32)

    def similarity(x, y):
        return token_similarity(x, y, back=True)

    to_text, to_image = search(similarity, images, texts, k=3, block=4)
    there, back = token_similarity(images, texts, back=True)
    assert torch.equal(to_text.indices, there.topk(3).indices)
    assert torch.equal(to_image.indices, back.topk(3).indices)
    assert not torch.equal(to_image.indices, there.T.topk(3).indices)


def halves(rank: int) -> dict[str, float]:
    images, texts = unit(8, 4, dtype=torch.float32), unit(16, 4, seed=1, dtype=torch.float32)
    recall, own = RetrievalRecall(), slice(5 * rank, 5 + 3 * rank)
    ids = torch.arange(8)[own]
    rows = torch.cat([ids * 2, ids * 2 + 1])
    recall.add(images[own], ids, texts[rows], rows // 2)
    return recall.compute(cosine)


def alike(rank: int) -> dict[str, float]:
    images, texts = unit(8, 4, dtype=torch.float32), unit(16, 4, seed=1, dtype=torch.float32)
    recall = RetrievalRecall(whole=True)
    recall.add(images, torch.arange(8), texts, torch.arange(16) // 2)
    return recall.compute(cosine)


def test_what_every_process_has_is_searched_once(ranks):
    wanted = alike(0)
    for found in ranks(alike):
        assert found == pytest.approx(wanted)


def test_processes_with_unequal_shares_give_the_recalls_of_one(ranks):
    images, texts, recall = unit(8, 4, dtype=torch.float32), unit(16, 4, seed=1, dtype=torch.float32), RetrievalRecall()
    recall.add(images, torch.arange(8), texts, torch.arange(16) // 2)
    whole = recall.compute(cosine)
    assert 0 < whole["mean"] < 1
    for found in ranks(halves):
        assert found == pytest.approx(whole)
