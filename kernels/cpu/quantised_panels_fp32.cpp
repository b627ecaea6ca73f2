#include "quantised_panels.h"

namespace legato {

template void QuantisedLinear<float>::panels(const QuantisedRows<float> &, ptrdiff_t, ptrdiff_t, ptrdiff_t) const;

}  // namespace legato
