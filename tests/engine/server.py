"""A model that serves, and the weights that it is sent."""

from vllm.model_executor.model_loader.reload.inplace import reload_weights

from engine.harness import (
    build,
    deepseek,
    engine_config,
    environment,
    outputs_are_right,
    plugin,
    with_projection,
    write,
)
from engine.kinds import exports_of


def checkpoint(makers):
    truth = {}
    return with_projection(deepseek(), exports_of(makers, truth)), truth


class Server:
    """A model with weights of one encoding, as a worker holds it."""

    def __init__(self, path, makers, switch="1", **arguments):
        tensors, self.truth = checkpoint(makers)
        self.config = engine_config(write(path, tensors))
        self.model = build(path, switch, **arguments)
        self.pointers = self.addresses()

    def addresses(self):
        return {name: p.data_ptr() for name, p in self.model.named_parameters() if "wk_weights_proj" in name}

    def reload(self, tensors, is_checkpoint_format=True):
        """By vLLM's own reload."""
        with plugin("1"), environment(self.config):
            reload_weights(self.config, self.model, tensors.items(), None, is_checkpoint_format)

    def check(self, truth):
        """It computes with these values, in the memory that CUDA graphs would hold on to."""
        outputs_are_right(self.model, truth)
        assert self.addresses() == self.pointers
