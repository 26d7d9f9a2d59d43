"""Training in several processes ("ranks"), as torchrun starts them. One process passes through none of this.

Each rank encodes its part of the batch. Only captions are exchanged, because they have fewer tokens: a rank
compares its images with the captions of all, and the ranks exchange these rows, so that no pair is computed
twice. Every rank then has the loss of the whole batch. The gradients of the ranks are averaged, which gives
every parameter the gradient that one process would compute.
"""
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import modules
from data import require

REGULARISERS = "consistency", "kl", "entropy", "gates"     # means over the batch, without others' pairs


class SharedRun:
    """What differs from train_grm.Run, which comes after it in the order of methods."""

    def __init__(self, config, out, device, signals, resume):
        device = start()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(config, out, device, signals, resume)
        if self.rank and not resume:                           # weights alike, noise each rank's own
            torch.manual_seed(config["train"]["seed"] + self.rank)

    def build_loader(self):
        super().build_loader()
        smallest = min(self.sampler.batch_size, self.sampler.items)
        require(smallest >= self.ranks, f"{self.ranks} processes cannot share a batch of {smallest}: raise "
                                        "train.batch_size or lower --nproc_per_node")

    # ---- a step --------------------------------------------------------------------------------------------
    def loss(self, image, text, image_ids, epochs):
        return shared_loss(self.model, image, text, image_ids, self.config["loss"], epochs)

    def gradients(self, batch, epochs):
        total, terms, image, text = super().gradients(batch, epochs)
        average([p.grad for p in self.model.parameters() if p.grad is not None])
        values = [total, *terms.values()]
        average(values)
        return values[0], dict(zip(terms, values[1:])), image, text

    def stop_or_late(self):
        flags = torch.tensor(super().stop_or_late(), device=self.device, dtype=torch.int)
        dist.all_reduce(flags)                                 # one rank's signal stops all, at the same step
        return tuple(bool(flag) for flag in flags.tolist())

    # ---- evaluation: each rank encodes a share of the captions and scores a share of the images ------------
    def evaluate(self, split, folds=1):
        matcher = self.matcher()
        title = split.name if self.rank == 0 and self.progress else None
        own = slice(self.rank, None, self.ranks)
        shares = gather_objects(matcher.caption_batches(split.texts, 512, title, own))
        texts = [batch for share in shares for batch in share]
        first, last = (len(split) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        rows = matcher.score_rows(split, range(first, last), texts, 128, title)
        parts = gather_objects({level: matrix.clone() for level, matrix in rows.items()})
        whole = {level: torch.cat([part[level] for part in parts]) for level in rows}
        return matcher.figures(whole, split, folds)

    def validate(self):
        for buffer in self.model.buffers():             # batch norm's statistics, if any, are each rank's own
            dist.broadcast(buffer, 0)
        super().validate()

    # ---- files and messages are rank 0's -------------------------------------------------------------------
    def prepare_folder(self, last):
        dist.barrier()                              # all have read what the folder holds
        if self.rank == 0:
            super().prepare_folder(last)
        else:
            self.metrics = open(os.devnull, "ab", buffering=0)
        dist.barrier()

    def save(self, *args):
        if self.rank == 0:
            super().save(*args)
        dist.barrier()

    def test(self):
        super().test()
        dist.destroy_process_group()                           # or NCCL warns as the process ends

    def say(self, text):
        if self.rank == 0:
            super().say(text)

    # ---- what every rank has a part of ---------------------------------------------------------------------
    def random_states(self):
        return [state for states in gather_objects(super().random_states()) for state in states]


def start() -> torch.device:
    """Joins the processes that torchrun started: NCCL between GPUs, gloo on the CPU -> this rank's device."""
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    require(not gpus or local < gpus, f"torchrun asks for {local + 1} processes or more here, one per GPU, "
                                      f"and there are {gpus} GPUs: lower --nproc_per_node")
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus else "gloo")
    return torch.device("cuda", local) if gpus else torch.device("cpu")


def shared_loss(model: modules.GRM, image, text, image_ids: Tensor, loss: dict, epochs: float):
    """GRM.loss for b of a batch's B pairs -> loss and terms, whose means over the ranks are the batch's."""
    valid, mask = (x[..., None].to(text.tokens) for x in (text.valid, text.mask))
    packed = gather(torch.cat([text.tokens, valid, mask], -1))             # (B, M, d + 2)
    pooled = gather(text.pooled) if model.levels["glo"] else None
    text = modules.TextFeatures(packed[..., :-2], packed[..., -2] > 0, packed[..., -1], pooled)
    rows = model.similarity(image, text)                                               # (b, B) for each level
    whole = gather(torch.stack(list(rows.values()), 1))                                    # (B, levels, B)
    ids = gather(image_ids)
    share = dist.get_world_size() * len(image_ids) / len(ids)        # 1, but for the parts of an uneven batch
    loss = loss | {name: share * loss[name] for name in REGULARISERS}
    total, terms = model.loss(image, text, ids, loss, epochs, dict(zip(rows, whole.unbind(1))))
    return total, {name: share * term if name in REGULARISERS else term for name, term in terms.items()}


def average(tensors: list[Tensor]):
    """Overwrites every tensor with its mean over the ranks."""
    messages = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]         # all under way at once
    for message, tensor in zip(messages, tensors):
        message.wait()
        tensor /= dist.get_world_size()


def gather(x: Tensor) -> Tensor:
    """(b, ...) of every rank, b differing, -> (B, ...) in the order of ranks; differentiable. Further
    dimensions of different size are padded with zeros to the largest."""
    shapes = torch.tensor(x.shape, device=x.device).repeat(dist.get_world_size(), 1)
    dist.all_gather(list(shapes.unbind()), shapes[0].clone())
    padding = (shapes.amax(0) - shapes[dist.get_rank()]).tolist()
    padded = F.pad(x, [n for size in reversed(padding) for n in (0, size)])
    return torch.cat([part[:b] for part, b in zip(_Gather.apply(padded), shapes[:, 0].tolist())])


class _Gather(torch.autograd.Function):
    """(b, ...) of every rank, of the same shape -> (R, b, ...). The gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous())
        return parts

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)                                  # gloo has no reduce-scatter
        return grad[dist.get_rank()]


def gather_objects(value) -> list:
    """Every rank's value, in the order of ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
