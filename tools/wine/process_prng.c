/* bcryptprimitives.dll for Wine 8, which has none: every Rust program wants this one function of it. */
#include <stddef.h>

__declspec(dllimport) unsigned char __stdcall SystemFunction036(void *buffer, unsigned long bytes);

__declspec(dllexport) int __stdcall ProcessPrng(unsigned char *data, size_t bytes)
{
    while (bytes > 0) {
        unsigned long part = bytes > 0x40000000 ? 0x40000000 : (unsigned long)bytes;
        if (!SystemFunction036(data, part))
            return 0;
        data += part;
        bytes -= part;
    }
    return 1;
}
