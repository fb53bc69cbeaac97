"""The smallest whole DDP program: two processes learn to read handwritten digits together.

    torchrun --nproc-per-node=2 ddp/minimal.py          # a few seconds; test accuracy above 0.9

Read it first. It uses nothing of this project, only torch and the 1 797 digits that come with scikit-learn. The six
marked places are all that distinguishes it from a program for one process.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn  # optimizers import it, and it keeps a group that exists by then alive beyond our end
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS, GLOBAL_BATCH = 10, 48

# 1. Every process is told by torchrun who it is, and joins the others.
if "RANK" not in os.environ:
    sys.exit("error: no RANK in the environment; start me with: torchrun --nproc-per-node=2 ddp/minimal.py")
use_cuda = torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
if use_cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if use_cuda else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
if GLOBAL_BATCH % world_size:
    sys.exit(f"error: a batch of {GLOBAL_BATCH} does not divide among {world_size} processes; take 1, 2, 3, 4, 6 or 8")

digits = load_digits()
images, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
train_set, test_set = TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])

# 2. Every rank draws its own part of each epoch, and of each batch.
sampler = DistributedSampler(train_set, shuffle=True, drop_last=True, seed=0)
loader = DataLoader(train_set, batch_size=GLOBAL_BATCH // world_size, sampler=sampler, drop_last=True)

# 3. The model is wrapped: rank 0's weights go to all, and gradients are averaged during backward.
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(device)
ddp_model = DistributedDataParallel(model, device_ids=[device.index] if use_cuda else None)
optimizer = torch.optim.AdamW(ddp_model.parameters(), lr=1e-2)

for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)  # 4. Without this line every epoch comes in the same order.
    total = torch.zeros(2, device=device)  # loss, batches
    for batch, target in loader:
        loss = F.cross_entropy(ddp_model(batch.to(device)), target.to(device))
        loss.backward()  # the gradients are averaged in here
        optimizer.step()
        optimizer.zero_grad()
        total += torch.stack([loss.detach(), torch.ones((), device=device)])

    # 5. Each rank tests every world_size-th digit, none twice; what is counted is summed over the ranks.
    correct = torch.zeros((), device=device)
    with torch.no_grad():
        for i in range(rank, len(test_set), world_size):
            image, label = test_set[i]
            correct += model(image.to(device)).argmax() == label
    dist.all_reduce(correct)
    dist.all_reduce(total)
    if rank == 0:
        print(f"epoch {epoch}  loss {total[0] / total[1]:.4f}  test accuracy {correct.item() / len(test_set):.4f}")

# 6. Leave together: a rank that is gone while others still talk makes them fail.
dist.barrier()
del ddp_model  # it holds the process group, whose threads must end before Python does
dist.destroy_process_group()
