"""CUDA without a GPU, for programs behind the walls: a library that answers as the driver does, and launches nothing.

It is compiled there, by the compiler that Triton takes, so that all of Triton's own way to a kernel is gone but for the
kernel itself: its driver's module in C, ptxas, the cache of what was compiled, the launch with its arguments.
"""

from __future__ import annotations

DRIVER = r"""
#include <stdint.h>
typedef int R; typedef void *P;
static int launched;
int launches(void) { return launched; }
R cuGetErrorString(int code, const char **told) { *told = "stand-in"; return 0; }
R cuDriverGetVersion(int *version) { *version = 13000; return 0; }
R cuDeviceGet(int *device, int number) { *device = number; return 0; }
R cuDeviceGetAttribute(int *value, int kind, int device) {
  *value = kind == 97 ? 232448 : kind == 12 ? 65536 : kind == 10 ? 32 : kind == 75 ? 9 : kind == 76 ? 0 : 128;
  return 0;
}
R cuCtxGetCurrent(P *context) { *context = (P)1; return 0; }
R cuCtxSetCurrent(P context) { return 0; }
R cuCtxGetLimit(uint64_t *value, int kind) { *value = 0; return 0; }
R cuCtxSetLimit(int kind, uint64_t value) { return 0; }
R cuDevicePrimaryCtxRetain(P *context, int device) { *context = (P)1; return 0; }
R cuModuleLoadData(P *module, const unsigned char *image) {
  *module = (P)1;
  return image[0] == 0x7f && image[1] == 'E' ? 0 : 200;
}
R cuModuleGetFunction(P *function, P module, const char *name) { *function = (P)1; return 0; }
R cuFuncGetAttribute(int *value, int kind, P function) { *value = kind == 0 ? 1024 : 0; return 0; }
R cuFuncSetAttribute(P function, int kind, int value) { return 0; }
R cuFuncSetCacheConfig(P function, int kind) { return 0; }
R cuPointerGetAttribute(P out, int kind, uint64_t pointer) { *(uint64_t *)out = pointer; return 0; }
R cuPointerGetAttributes(unsigned count, int *kinds, P *out, uint64_t pointer) { return 0; }
R cuLaunchKernelEx(const P config, P function, P *arguments, P *extra) { launched++; return 0; }
R cuTensorMapEncodeTiled(void) { return 1; }
R cuTensorMapEncodeIm2col(void) { return 1; }
R cuOccupancyMaxActiveClusters(void) { return 1; }
"""

PRELUDE = f'''
import ctypes, os, subprocess
from types import SimpleNamespace
import torch, triton
from triton.runtime import driver

class Event:
    """One millisecond passes between any two."""

    def __init__(self, enable_timing=True):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0

def stand_in():
    """Answers as a GPU of Hopper's kind; the functions of torch that Triton asks are those of a CPU build."""
    folder = os.getcwd()
    with open("cuda.c", "w") as file:
        file.write({DRIVER!r})
    library = os.path.join(folder, "libcuda.so.1")
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, "cuda.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    loaded = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    from triton.backends.nvidia.driver import CudaDriver
    cuda = CudaDriver()
    cuda.get_current_stream = lambda device: 0
    cuda.get_device_interface = lambda: SimpleNamespace(Event=Event, synchronize=lambda: None)
    cuda.get_empty_cache_for_benchmark = lambda: torch.empty(64, dtype=torch.int)
    driver.set_active(cuda)
    return loaded

library = stand_in()
'''
"""Put before a program: its kernels are compiled, loaded and launched by Triton, and `library.launches()` counts."""

COMPILES = r'''
import importlib.util, json, os, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from luthier.assets.kernels import kernel_rows
from luthier.data.kernel_programs import kernel_form
from tests.rewards.kernels import SOLUTIONS

class Utils:
    def load_binary(self, name, kernel, shared, device):
        assert kernel[:4] == b"\x7fELF"
        return (1, 2, 32, 0, 1024)
    def get_device_properties(self, device):
        return {"max_shared_mem": 101376, "multiprocessor_count": 100}

class Chip:
    """What Triton asks a driver; it launches nothing."""
    utils = Utils()
    def __init__(self, kind): self.kind = kind
    def launcher_cls(self, source, metadata): return lambda *arguments: None
    def get_current_target(self): return GPUTarget("cuda", self.kind, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

rows = {row["function"]: row for row in map(json.loads, kernel_rows().splitlines())}
for kind in (80, 90, 100):
    driver.set_active(Chip(kind))
    for name in sys.argv[1].split(","):
        drawing = {}
        exec(rows[name]["inputs"], drawing)
        timed = [torch.zeros(size) if isinstance(size, list) else size for size in rows[name]["timed"]]
        for text in (SOLUTIONS[name], kernel_form(SOLUTIONS[name], name).without):
            path = os.path.join(os.environ["TRITON_CACHE_DIR"], f"{name}_{kind}.py")
            with open(path, "w") as file:
                file.write(text)
            found = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            for given in (*drawing["draw"](7), timed):
                getattr(module, name)(*[torch.tensor(each) if isinstance(each, list) else each for each in given])
        print(f"{kind}:{name}")
'''
"""Compiles the solutions of operators for three kinds of chips, by the way of a launch."""
