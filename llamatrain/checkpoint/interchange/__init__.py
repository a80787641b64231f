"""Weights and tokenizers in the forms of other programs: Hugging Face directories and Meta's released files.

Every form is read through `Source` and written by a function of a `Source`, so each goes into each. Tensors pass one at
a time and in the names and layout of this program: rows of wq and wk in rotary pairs, nothing cut.
"""
