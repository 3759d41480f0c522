"""A pretrained classifier behind the transform, under attack: unaware of it, and then through it (extra ``demo``).

python examples/defended_model.py

The second attack is the one that counts for anybody who needs robustness: BPDA takes the purification for the identity in the
backward pass, EOT averages over its randomness. Defenses of this kind don't withstand it.
"""

import foolbox
import torch
from torch import Tensor

from oag_transform import DefendedModel, OnlineAlternateGenerator
from oag_transform.evaluation.backbones import efficientnet_lite


def main(count: int = 8, steps: int = 8, eot: int = 2, **settings: int) -> dict[str, float]:
    """Accuracy of the defended classifier on clean images, under a gray-box attack, and under BPDA + EOT."""
    target = efficientnet_lite(0)
    # your own: DefendedModel.from_torchvision("resnet50"), or DefendedModel(target, normalize=Normalize(mean, std))
    defended = DefendedModel(target, OnlineAlternateGenerator(**settings))  # type: ignore[arg-type]

    plain = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(plain, dataset="imagenet", batchsize=count, shape=(224, 224))
    labels = labels.long()
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=1 / 255, steps=steps, random_start=False)
    gray_box = attack(plain, images, labels, epsilons=6 / 255)[1]

    # each gradient is averaged over ``eot`` purifications; gradients pass straight through each of them
    eot_model = DefendedModel(target, defended.defense, samples=eot)
    adaptive = attack(foolbox.PyTorchModel(eot_model, bounds=(0, 1), device="cpu"), images, labels, epsilons=6 / 255)[1]

    def accuracy(model: torch.nn.Module, batch: Tensor) -> float:
        with torch.no_grad():
            return float((model(batch).argmax(1) == labels).float().mean())

    figures = {
        "target, clean": accuracy(target, images),
        "target, attacked": accuracy(target, gray_box),
        "defended, clean": accuracy(defended, images),
        "defended, attacked (gray box)": accuracy(defended, gray_box),
        "defended, attacked through the defense (BPDA + EOT)": accuracy(defended, adaptive),
    }
    for name, value in figures.items():
        print(f"{name:<54}{value:.2f}")
    return figures


if __name__ == "__main__":
    main()
