"""From a config to what it names: tasks, network, learner, device."""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

import innerloop.nn
from innerloop.data import (
    Episodes,
    ImageDataset,
    Preprocessing,
    Sinusoids,
    TaskSource,
    image_folder,
    mini_imagenet,
    omniglot,
    strokes,
)
from innerloop.learner import MetaLearner
from innerloop.network import Loss
from innerloop.training.config import Config, ConfigError, DataConfig
from innerloop.training.distributed import ALONE, DistributedWorkers, Ranks
from innerloop.training.memory import keep_freed_memory
from innerloop.training.workers import Workers, available_cores

# Mean and deviation of ImageNet's channels, as every ImageNet pipeline and the published code use them.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_device(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """The device a config names, found to be there; each rank's own GPU where there are several on a machine.

    Raises:
        ConfigError: it is not.
    """
    name = config.compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and ranks.local_size > 1:
            if device.index is not None:
                raise ConfigError(
                    f"--device {name} is one GPU, and each of {ranks.local_size} ranks takes its own: --device cuda"
                )
            device = torch.device(name := f"cuda:{ranks.local_rank}")
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used: {reason}; --device auto takes what there is") from None
    tf32 = config.compute.precision == "tf32"
    if tf32 and device.type != "cuda":
        raise ConfigError(
            f"--precision tf32 is a GPU's, and this run is on {device}: give --precision float32, or bf16"
        )
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    return device


def build_tasks(config: Config, device: torch.device, progress: bool = False) -> TaskSource:
    """Tasks of the config's data set; reads or draws the images, which can take seconds.

    Raises:
        ConfigError: the data set needs ``--data``.
        ValueError, FileNotFoundError: the data are not what the config needs.
    """
    data, seed = config.data, config.compute.seed
    if data.dataset == "sinusoid":
        return Sinusoids(shots=data.shots, queries=data.queries, seed=seed, device=device)
    preprocessing = build_preprocessing(config)
    return Episodes(
        _images(data, preprocessing, seed, progress),
        ways=data.ways,
        shots=data.shots,
        queries=data.queries,
        seed=seed,
        rotations=data.rotations,
        mean=preprocessing.mean,
        std=preprocessing.std,
        device=device,
    )


def build_preprocessing(config: Config) -> Preprocessing:
    """What a config's images go through before the network sees them, the same in training and in use.

    Raises:
        ConfigError: its tasks are not made of images.
    """
    data = config.data
    if config.regression:
        raise ConfigError(f"--dataset {data.dataset} is regression and has no images")
    colour = data.channels == 3
    # Strokes are drawn bright; files of Omniglot are dark ink on white paper.
    bright = data.dataset in ("strokes", "omniglot") or (data.dataset == "folder" and data.invert)
    return Preprocessing(
        size=data.image_size,
        channels=data.channels,
        fit="ink" if data.centre else "crop" if data.dataset == "folder" else "stretch",
        invert=bright and data.dataset != "strokes",
        mean=_IMAGENET_MEAN if colour else None,
        std=_IMAGENET_STD if colour else None,
        ink="bright" if bright else None,
        bits=data.bits or None,
    )


def _images(data: DataConfig, preprocessing: Preprocessing, seed: int, progress: bool) -> ImageDataset:
    size = preprocessing.size
    if data.dataset == "strokes":
        classes = {"train": data.train_classes, "val": 100, "test": 400}
        return strokes(classes, size=size, seed=seed, fit=preprocessing.fit, progress=progress)  # type: ignore[arg-type]
    if data.dataset == "omniglot":
        return omniglot(
            data.data,
            size=size,
            split=data.split,
            seed=seed,
            download=data.download,
            fit=preprocessing.fit,
            skip_broken=data.skip_broken,
            progress=progress,
        )
    if data.data is None:
        raise ConfigError(f"--dataset {data.dataset} needs the folder of its images: --data DIR")
    if data.dataset == "mini-imagenet":
        return mini_imagenet(
            data.data,
            size=size,
            splits_dir=data.splits_dir,
            bits=preprocessing.bits,
            skip_broken=data.skip_broken,
            progress=progress,
        )
    return image_folder(
        data.data,
        size=size,
        channels=preprocessing.channels,
        ratios=data.ratios,
        at_least=data.shots + data.queries,
        fit=preprocessing.fit,
        invert=preprocessing.invert,
        bits=preprocessing.bits,
        seed=seed,
        skip_broken=data.skip_broken,
        progress=progress,
    )


def build_workers(
    config: Config, learner: MetaLearner, source: TaskSource, device: torch.device, ranks: Ranks = ALONE
) -> Workers:
    """The processes that share the work, each with its threads: workers of this one, or the ranks.

    Raises:
        ConfigError: several processes are asked for on a GPU or for each rank.
    """
    cores = max(1, available_cores() // ranks.local_size)
    processes = config.compute.processes
    if ranks.group is not None:
        if processes > 1:
            raise ConfigError(f"--processes {processes}: each of several ranks is one process; take --processes 1")
        processes = 1
    elif device.type != "cpu":
        if processes > 1:
            raise ConfigError(f"--processes {processes} is for the CPU, and this run is on {device}: --processes 0")
        processes = 1
    elif not processes:
        processes = 1 if learner.vmapped else min(cores, config.outer.meta_batch)
    threads = config.compute.threads or max(1, cores // processes)
    if device.type == "cpu":
        torch.set_num_threads(threads)
        keep_freed_memory()
    capture = device.type == "cuda" and config.compute.cuda_graph and learner.vmapped
    if ranks.group is not None:
        return DistributedWorkers(learner, source, ranks, capture=capture)
    return Workers(learner, source, processes, threads, capture=capture)


def build_learner(config: Config, device: torch.device, loss: Loss | None = None) -> MetaLearner:
    """The config's network with freshly drawn weights, in a MetaLearner of its method and ``loss``, if not its own."""
    torch.manual_seed(config.compute.seed)
    network = build_network(config).to(device)
    if device.type == "cpu":
        # Convolutions of these shapes run two to three times faster channels-last on CPUs.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compute = config.compute
    return MetaLearner(
        network,
        loss or (F.mse_loss if config.regression else F.cross_entropy),
        config.method,
        compute.mode,
        stored_steps=compute.stored_steps,
        precision="bf16" if compute.precision == "bf16" else "float32",
        compile=compute.compile,
        compile_timeout=compute.compile_timeout,
    )


def build_network(config: Config) -> nn.Module:
    """The config's network with freshly drawn weights.

    Raises:
        ConfigError: it is larger than the machine's memory.
    """
    try:
        with torch.device("meta"):
            size = sum(p.numel() * p.element_size() for p in _network(config).parameters())
    except (RuntimeError, TypeError, OverflowError):  # of PyTorch: the sizes do not fit into its numbers
        size = sys.maxsize
    if size > _memory():
        raise ConfigError(
            f"--network {config.network.network} with --filters {config.network.filters}, --ways {config.data.ways} "
            f"and --image-size {config.data.image_size} is larger than this machine's memory; make it smaller"
        )
    return _network(config)


def _memory() -> int:
    """Bytes of memory that the machine has; where the system does not say, what no machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**45


def _network(config: Config) -> nn.Module:
    data, network = config.data, config.network
    if network.network == "mlp":
        return innerloop.nn.MLP()
    if network.network == "resnet12":
        widths = [network.filters, *(int(network.filters * m) for m in (2.5, 5, 10))]
        return innerloop.nn.ResNet12(data.ways, data.channels, widths)
    return innerloop.nn.Conv4(data.ways, data.channels, data.image_size, network.filters, network.strided)
