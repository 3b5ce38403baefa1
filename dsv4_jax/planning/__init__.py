"""What a TPU slice will do with a model before anybody pays for it: memory, step time, money.

Everything here is computed from shapes, published rates and stated efficiencies, or read from a program that
the TPU compiler made for a slice nobody has. Nothing is measured.
"""
