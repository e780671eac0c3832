"""Which of transformers' classes a checkpoint is loaded as, and the same model on the meta device, which takes no memory.

A checkpoint that also takes pictures is loaded as what it is, with its vision part, and tuned as a text model: so it is saved under
the names that it came with.
"""

from __future__ import annotations

from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.nf4 import falcon_linears_as_plain

CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def model_class(config: Any) -> Any:
    """Returns transformers' automatic class for a configuration: causal language models, else those that take pictures too.

    Raises:
        ModelError: it is neither, an encoder-decoder, or a classifier.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder-decoder, whose answers depend on what its encoder reads",
            expected="a causal language model, which continues one text",
            next_step="Choose another model.",
        )
    built_as = getattr(config, "architectures", None) or ()
    if built_as and all(str(each).endswith(CLASSIFIERS) for each in built_as):
        raise ModelError(
            f"the checkpoint is a {built_as[0]}, whose head for classes would be dropped",
            expected="a causal language model, which continues a text",
            next_step="Choose the language model that it was made from.",
        )
    for found in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in found._model_mapping:
            return found
    raise ModelError(
        f"{config.model_type} is not a causal language model",
        next_step="Choose another model.",
    )


def meta_model(config: Any, **more: Any) -> Any:
    """Builds the model of a configuration on the meta device, with tied weights.

    Args:
        config: transformers' configuration.
        more: further arguments of `from_config`.
    """
    from accelerate import init_empty_weights

    with falcon_linears_as_plain(), init_empty_weights():
        model = model_class(config).from_config(config, **more)
    model.tie_weights()
    return model
