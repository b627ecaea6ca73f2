#include "quantised_panels.h"

namespace legato {

template void QuantisedLinear<Bf16>::panels(const QuantisedRows<Bf16> &, ptrdiff_t, ptrdiff_t, ptrdiff_t) const;

}  // namespace legato
