"""The simulators: four test backends, each with one vendor's rules, on an emulated device."""
