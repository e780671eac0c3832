"""Stand-ins for the module `pynvml`, for machines without an NVIDIA GPU."""

from __future__ import annotations

from types import SimpleNamespace

from qlora_helpers.base.units import BYTES_IN_GIB


class FakeNvml:
    """NVML with two cards: one that tells everything, and one like a MIG slice, that tells only its memory."""

    NVML_TEMPERATURE_GPU = 0
    NVML_FEATURE_ENABLED = 1
    NVML_NVLINK_MAX_LINKS = 18
    nvlinks = 0  # that are up

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self):
        return 12040

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return ["NVIDIA A10G", "NVIDIA <slice>"][handle]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=3 * BYTES_IN_GIB, total=24 * BYTES_IN_GIB)

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._only_the_first(handle)
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetPowerUsage(self, handle):
        self._only_the_first(handle)
        return 212_500

    def nvmlDeviceGetTemperature(self, handle, sensor):
        self._only_the_first(handle)
        return 61

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (8, 6)

    def nvmlDeviceGetNvLinkState(self, handle, link):
        if not self.nvlinks:
            raise self.NVMLError("Not Supported")
        return int(link < self.nvlinks)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return 5

    def _only_the_first(self, handle):
        if handle != 0:
            raise self.NVMLError("Not Supported")


class NoDriver(FakeNvml):
    def nvmlInit(self):
        raise self.NVMLError("Driver Not Loaded")


class LostCard(FakeNvml):
    def nvmlDeviceGetHandleByIndex(self, index):
        if index == 1:
            raise self.NVMLError("GPU is lost")
        return index
