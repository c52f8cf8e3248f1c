"""Evaluation on a single view."""

import torch
from torch import nn

from reslearn.evaluation.protocols import single_view


class Source:
    """Four images that differ from their flips."""

    holes: set[int] = set()  # noqa: RUF012
    labels = torch.arange(4)

    def __len__(self) -> int:
        return 4

    def eval_batch(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(4 * 3 * 2 * 5, dtype=torch.float32).reshape(4, 3, 2, 5)[start:stop]


def test_flip_averages_the_logits_of_image_and_flip() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    images = Source().eval_batch(0, 4)
    with torch.no_grad():
        expected = (model(images) + model(images.flip(3))) / 2
    torch.testing.assert_close(single_view(model, Source(), flip=True, batch=3).logits, expected)
    assert not torch.allclose(single_view(model, Source()).logits, expected)
