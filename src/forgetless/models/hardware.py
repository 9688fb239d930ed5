"""Which device and dtype to use here, and what to write into a record about the machine."""

from __future__ import annotations

import os
import platform

import psutil
import torch

# Names in torch.cpu.get_capabilities(): instructions that multiply bf16 and accumulate in fp32.
_CPU_BF16 = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "sve_bf16": "SVE-BF16",
    "bf16": "NEON-BF16",
}
GIB = 2**30


def pick_device() -> torch.device:
    """The first CUDA device, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; emulation counts as no.

    MPS counts as no: nothing here has been tried on it in bf16.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_bf16() is not None


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on the device can take; on MPS and the CPU, of the main memory."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch holds without using it is no longer the driver's to give, but ours.
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def describe_hardware() -> dict[str, str]:
    """CPU, cores, memory, bf16 support and GPUs of this machine, as words for a record."""
    facts = {
        "cpu": _cpu_name(),
        "cores": str(_usable_cores()),
        "torch_threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "cpu_bf16": _cpu_bf16() or "none",
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(pick_device()),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts[f"gpu_{index}"] = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    return facts


def peak_memory() -> dict[str, float]:
    """Most bytes that this process has held so far, and, where there are any, on each GPU.

    Without `process` where the operating system does not tell (Windows).
    """
    found = {}
    try:
        import resource
    except ImportError:
        pass
    else:
        unit = 1 if platform.system() == "Darwin" else 1024
        found["process"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found[f"gpu_{index}"] = float(torch.cuda.max_memory_allocated(index))
    return found


def _cpu_bf16() -> str | None:
    capabilities = torch.cpu.get_capabilities()
    return next((word for key, word in _CPU_BF16.items() if capabilities.get(key)), None)


def _cpu_name() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name")
    return str(name or platform.processor() or platform.machine()).strip()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux only; smaller than cpu_count in a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
