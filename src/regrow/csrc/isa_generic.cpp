// Vectors of 4 floats, on any CPU.
#include "kernels.h"

REGROW_TABLE(kGenericTable, "generic");
