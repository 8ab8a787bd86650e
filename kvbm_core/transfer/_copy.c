/* One GIL-free call that copies many scattered pages: kvbm_core.transfer._copy.
 *
 * A Python loop of page copies beside a busy engine thread waits for the GIL at every page, so
 * the whole batch is one call. Pages are written with non-temporal stores where the processor
 * has them: the bytes are not read again soon, and a plain copy would first fetch every
 * destination line and push the model's working set out of the cache.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

typedef struct {
    int64_t address, stride, bytes, host_offset;
} plane_t;

#if defined(__SSE2__)
static void copy_page(char *dst, const char *src, size_t n) {
    if (((uintptr_t)dst & 15) == 0) {
        for (; n >= 64; n -= 64, dst += 64, src += 64) {
            __m128i a = _mm_loadu_si128((const __m128i *)src);
            __m128i b = _mm_loadu_si128((const __m128i *)(src + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(src + 32));
            __m128i d = _mm_loadu_si128((const __m128i *)(src + 48));
            _mm_stream_si128((__m128i *)dst, a);
            _mm_stream_si128((__m128i *)(dst + 16), b);
            _mm_stream_si128((__m128i *)(dst + 32), c);
            _mm_stream_si128((__m128i *)(dst + 48), d);
        }
    }
    memcpy(dst, src, n);
}
#define COPY_FENCE() _mm_sfence()
#else
#define copy_page memcpy
#define COPY_FENCE() ((void)0)
#endif

static int ids_below(const uint32_t *ids, Py_ssize_t n, unsigned long long limit) {
    for (Py_ssize_t i = 0; i < n; i++)
        if (ids[i] >= limit) return 0;
    return 1;
}

static void copy_blocks(const plane_t *planes, Py_ssize_t num_planes, char *host,
                        size_t host_block_bytes, const uint32_t *device_ids,
                        const uint32_t *host_ids, Py_ssize_t n, int to_host) {
    for (Py_ssize_t i = 0; i < n; i++) {
        char *block = host + (size_t)host_ids[i] * host_block_bytes;
        for (Py_ssize_t p = 0; p < num_planes; p++) {
            char *page = (char *)(intptr_t)planes[p].address +
                         (int64_t)device_ids[i] * planes[p].stride;
            char *slot = block + planes[p].host_offset;
            if (to_host)
                copy_page(slot, page, (size_t)planes[p].bytes);
            else
                copy_page(page, slot, (size_t)planes[p].bytes);
        }
    }
    COPY_FENCE();
}

/* copy_blocks(planes, host_address, host_block_bytes, num_device_blocks, num_host_blocks,
 *             device_ids, host_ids, to_host)
 * planes: int64 (address, stride, page bytes, offset in host block) each; ids: u32 each. */
static PyObject *py_copy_blocks(PyObject *module, PyObject *args) {
    Py_buffer planes, device_ids, host_ids;
    unsigned long long host, host_block_bytes, num_device, num_host;
    int to_host;
    if (!PyArg_ParseTuple(args, "y*KKKKy*y*p", &planes, &host, &host_block_bytes, &num_device,
                          &num_host, &device_ids, &host_ids, &to_host))
        return NULL;
    Py_ssize_t n = device_ids.len / 4;
    const char *problem = NULL;
    if (planes.len % sizeof(plane_t)) problem = "planes are not whole records";
    else if (device_ids.len % 4 || device_ids.len != host_ids.len)
        problem = "device and host ids differ in number";
    else if (!ids_below(device_ids.buf, n, num_device)) problem = "a device block id is too large";
    else if (!ids_below(host_ids.buf, n, num_host)) problem = "a host block id is too large";
    if (problem == NULL) {
        Py_BEGIN_ALLOW_THREADS
        copy_blocks(planes.buf, planes.len / (Py_ssize_t)sizeof(plane_t), (char *)(uintptr_t)host,
                    host_block_bytes, device_ids.buf, host_ids.buf, n, to_host);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&planes);
    PyBuffer_Release(&device_ids);
    PyBuffer_Release(&host_ids);
    if (problem != NULL) {
        PyErr_SetString(PyExc_ValueError, problem);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy_blocks", py_copy_blocks, METH_VARARGS, "Copy scattered blocks without the GIL."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_copy", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__copy(void) { return PyModule_Create(&module); }
