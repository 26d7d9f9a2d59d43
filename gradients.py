"""The gradient of one batch, computed at once or, where memory is short, in parts (gradient caching); and
encoders compiled for it."""
import contextlib

import torch

from modules import GRM


def compile_encoders(model: GRM, **options):
    """Passes the layers that the encoders repeat through torch.compile, which then compiles one of each kind:
    of the whole it would take minutes. Images have one size, or another in evaluation, captions many."""
    torch._dynamo.config.recompile_limit = 64                      # Swin has many kinds of layers
    _compile_layers(model.image_encoder, dynamic=False, **options)
    _compile_layers(model.text_encoder, **options)


def _compile_layers(module: torch.nn.Module, **options) -> bool:
    """The innermost layers that are repeated -> whether there are any."""
    found = [_compile_layers(child, **options) for child in module.children()]
    repeated = isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(found) > 1
    if any(found) or not repeated or len({type(child) for child in module.children()}) > 1:
        return any(found)
    for layer in module.children():
        layer.compile(**options)
    return True


def gradients(model: GRM, batch: dict, loss, micro_batch: int | None, amp=contextlib.nullcontext(),
              scale=lambda x: x):
    """Leaves the gradient of one batch in the parameters -> loss, terms, image and text features, detached.

    loss: (image, text, image_ids) -> loss, terms. With micro_batch, gradient caching (Gao et al., 2021):
    encode the batch in parts without a graph, differentiate the loss with respect to all features, encode
    each part again, under the same random numbers, and carry that gradient on. The gradient is the same for
    the memory of one part; only batch norm takes its statistics over a part.
    """
    inputs = [batch[key] for key in ("images", "ids", "valid", "words")]
    size = len(batch["images"])
    if not micro_batch or micro_batch >= size:
        with amp:
            image, text = model(*inputs)
            total, terms = loss(image, text, batch["image_ids"])
        scale(total).backward()
        return total.detach(), terms, detached(image), detached(text)
    rows = [slice(start, start + micro_batch) for start in range(0, size, micro_batch)]
    random_states, encoded = [], []
    with torch.no_grad(), amp:
        for part in rows:
            random_states.append(random_state())
            encoded.append(model(*(x[part] for x in inputs)))
    image, text = (type(parts[0])(*(torch.cat(x) for x in zip(*parts))) for parts in zip(*encoded))
    leaves = [*image, *text]
    for x in leaves:
        x.requires_grad_(x.is_floating_point())
    with amp:
        total, terms = loss(image, text, batch["image_ids"])
    scale(total).backward()
    after = random_state()
    for part, state in zip(rows, random_states):
        set_random_state(state)
        # Autocast is entered anew for each pass, because its copies of the weights must not cross no_grad.
        with amp:
            image_part, text_part = model(*(x[part] for x in inputs))
            again = [*image_part, *text_part]
            carried = sum((x * leaf.grad[part]).sum() for x, leaf in zip(again, leaves)
                          if leaf.grad is not None and x.requires_grad)
        carried.backward()
    set_random_state(after)
    return total.detach(), terms, detached(image), detached(text)


def detached(features):
    return type(features)(*(x.detach() for x in features))


def random_state() -> list[torch.Tensor]:
    """What torch draws from in this process: the CPU's state and, with a GPU, that of the current one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_state(state: list[torch.Tensor]):
    torch.set_rng_state(state[0].clone())                  # of a view, torch.set_rng_state reads other memory
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1].clone())
