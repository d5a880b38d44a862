// Vectors of 4 floats, on any CPU.
#include "isa.h"

REGROW_TABLE(kGenericTable, "generic");
