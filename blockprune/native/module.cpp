// An importable module, so that the ordinary build and install machinery finds a place for the library. Its functions are plain C functions
// over raw memory, which Python calls through ctypes: nothing here knows torch, so one build serves every version of torch.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernels", NULL, 0, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_kernels(void) { return PyModule_Create(&module); }
