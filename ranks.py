"""One batch over several processes ("ranks"), as torchrun starts them; with one process, everything here does nothing.

Each rank encodes its part of the batch. Captions travel, images, which have more tokens, stay: a rank compares its images
with the captions of all, (b, B) of the similarity (B, B), and the ranks exchange these rows, so that no pair is computed
twice. Every rank then has the whole loss; exchanging sums the gradients of the R ranks and DistributedDataParallel divides
them by R, so that the parameters get the gradient of one process with the whole batch.
"""
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import modules

REGULARISERS = ("consistency", "kl", "entropy")                # means over the batch that need no other rank's pairs


def start() -> torch.device:
    """Joins the processes that torchrun started, if it did: NCCL between GPUs, gloo on the CPU. -> this rank's device."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise modules.ModelError(f"torchrun asks for {local + 1} processes or more here, one per GPU, and there are "
                                 f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def finish():
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait():
    if count() > 1:
        dist.barrier()


def sum_over(x: Tensor) -> Tensor:
    """x, overwritten by the sum of every rank's."""
    if count() > 1:
        dist.all_reduce(x)
    return x


def broadcast(tensors):
    """Overwrites the tensors with rank 0's."""
    for tensor in tensors if count() > 1 else ():
        dist.broadcast(tensor, 0)


def gather(x: Tensor) -> Tensor:
    """(b, ...) of every rank, b differing, -> (B, ...) in the order of ranks; differentiable. Further dimensions of
    different size are padded with zeros to the largest."""
    if count() == 1:
        return x
    shapes = torch.tensor(x.shape, device=x.device).repeat(count(), 1)
    dist.all_gather(list(shapes.unbind()), shapes[0].clone())
    padding = (shapes.amax(0) - shapes[rank()]).tolist()
    padded = F.pad(x, [n for size in reversed(padding) for n in (0, size)])
    return torch.cat([part[:b] for part, b in zip(_Gather.apply(padded), shapes[:, 0].tolist())])


class _Gather(torch.autograd.Function):
    """(b, ...) of every rank, of the same shape -> (R, b, ...); the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = x.new_empty(count(), *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous())
        return parts

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)                                  # gloo has no reduce-scatter
        return grad[rank()]


def parallel(model: modules.GRM):
    """What train_grm.gradients takes: the model, or with several ranks DistributedDataParallel around its shared loss.

    Parameters may be without a gradient (BERT's pooler, the parts of a level of weight 0). Buffers are not exchanged at
    every step: a rank that encodes its part at once and one that does so in pieces would exchange them out of turn.
    """
    if count() == 1:
        return model
    shared = DistributedDataParallel(SharedLoss(model), find_unused_parameters=True)
    shared.broadcast_buffers = False                           # as an argument, its name depends on torch's version
    return shared


class SharedLoss(nn.Module):
    """GRM.loss of a batch of which every rank holds a part (b pairs of B). One call makes one number to differentiate, for
    that is what DistributedDataParallel needs to tell which parameters take part."""

    def __init__(self, model: modules.GRM):
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple, image_ids: Tensor | None = None, loss: dict | None = None, cached=None):
        """inputs: images, ids and valid of this rank. With image_ids (b,) and the `loss` block -> loss, terms, features, the
        last two detached. With the `cached` gradient of each feature -> a number whose gradient carries it on."""
        image, text = self.model(*inputs)
        if cached is not None:
            return sum((x * g).sum() for x, g in zip((*image, *text), cached) if g is not None and x.requires_grad)
        total, terms = self.loss(image, text, image_ids, loss)
        return total, terms, *(type(features)(*(x.detach() for x in features)) for features in (image, text))

    def loss(self, image: modules.ImageFeatures, text: modules.TextFeatures, image_ids: Tensor, loss: dict):
        """-> loss and terms whose means over the ranks are those of the whole batch."""
        if count() == 1:
            return self.model.loss(image, text, image_ids, loss)
        image_ids_of_all = gather(image_ids)
        share = count() * len(image_ids) / len(image_ids_of_all)           # 1, but for the parts of an uneven batch
        loss = loss | {name: share * loss[name] for name in REGULARISERS}
        regularisers = self.model.regularisers(image)                       # first, as in GRM.loss
        total, terms = self.model.loss_of(self.similarity(image, text), regularisers, image_ids_of_all, loss)
        return total, {name: share * term if name in REGULARISERS else term for name, term in terms.items()}

    def similarity(self, image: modules.ImageFeatures, text: modules.TextFeatures) -> dict[str, Tensor]:
        """(B, B) for every level, of which this rank computes its images' rows."""
        packed = torch.cat([text.tokens, text.valid[..., None].to(text.tokens), text.mask[..., None].to(text.tokens)], -1)
        packed = gather(packed)                                            # (B, M, d + 2)
        text = modules.TextFeatures(packed[..., :-2], packed[..., -2] > 0, packed[..., -1])
        rows = self.model.similarity(image, text)
        of_all = gather(torch.stack(list(rows.values()), 1))               # (B, levels, B)
        return dict(zip(rows, of_all.unbind(1)))
