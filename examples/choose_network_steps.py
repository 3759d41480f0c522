"""Choose T_N for a classifier and images without an attack (section III-D of the paper; extra ``demo``).

python examples/choose_network_steps.py
"""

import foolbox

from oag_transform import NetworkSteps, OnlineAlternateGenerator, choose_network_steps
from oag_transform.evaluation.backbones import efficientnet_lite


def main(count: int = 20, longest: int = 60, every: int = 5) -> NetworkSteps:
    """Print the accuracy on purified Gaussian-noised images by network step; returns the chosen number of steps."""
    target = efficientnet_lite(0)
    model = foolbox.PyTorchModel(target, bounds=(0, 1), device="cpu")
    images, labels = foolbox.samples(model, dataset="imagenet", batchsize=count, shape=(224, 224))

    defense = OnlineAlternateGenerator(network_steps=longest, seed=0)
    chosen = choose_network_steps(target, images, labels.long(), noise_std=0.1, defense=defense, every=every)
    for step, accuracy in chosen.curve:
        print(f"{step:4d} {accuracy:5.2f} {'#' * round(40 * accuracy)}{'  <- chosen' if step == chosen.steps else ''}")
    return chosen


if __name__ == "__main__":
    main()
