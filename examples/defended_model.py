"""A defended pretrained classifier under a gray-box and under an adaptive attack (extra ``demo``).

python examples/defended_model.py

The gray-box attack knows the classifier only. The adaptive attack knows the defense too: BPDA takes its gradient for that of
the identity, and EOT averages over its randomness. Defenses of this kind do not withstand adaptive attacks.
"""

from typing import Any

import foolbox
import torch
from torch import Tensor

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.evaluation.backbones import efficientnet_lite


def main(count: int = 8, steps: int = 8, eot: int = 2, **settings: Any) -> dict[str, float]:
    """Clean accuracy, and accuracy under a gray-box attack and under an adaptive attack (BPDA + EOT)."""
    target = efficientnet_lite(0)
    # another classifier: DefendedModel.from_torchvision("resnet50"), or DefendedModel(target, normalize=Normalize(mean, std))
    defended = DefendedModel(target, OnlineAlternateGenerator(**settings))

    plain = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(plain, dataset="imagenet", batchsize=count, shape=(224, 224))
    labels = labels.long()
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=1 / 255, steps=steps, random_start=False)
    gray_box = attack(plain, images, labels, epsilons=6 / 255)[1]

    # each gradient is an average over ``eot`` purifications, with the straight-through gradient
    eot_model = DefendedModel(target, defended.defense, samples=eot)
    adaptive = attack(foolbox.PyTorchModel(eot_model, bounds=(0, 1), device="cpu"), images, labels, epsilons=6 / 255)[1]

    def accuracy(model: torch.nn.Module, batch: Tensor) -> float:
        with torch.no_grad():
            return float((model(batch).argmax(1) == labels).float().mean())

    figures = {
        "undefended, clean": accuracy(target, images),
        "undefended, gray-box attack": accuracy(target, gray_box),
        "defended, clean": accuracy(defended, images),
        "defended, gray-box attack": accuracy(defended, gray_box),
        "defended, adaptive attack (BPDA + EOT)": accuracy(defended, adaptive),
    }
    for name, value in figures.items():
        print(f"{name:<42}{value:.2f}")
    return figures


if __name__ == "__main__":
    main()
