"""The table of ops that models are written against, the data it works on, and its implementations.

`table.Ops` fixes what each op means; `reference` (plain torch) is the oracle of every other implementation.
"""
