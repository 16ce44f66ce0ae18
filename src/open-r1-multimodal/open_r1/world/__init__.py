"""A rendered spatial world: seeded scenes of known geometry that ask what SAT and CV-Bench ask. No torch."""
