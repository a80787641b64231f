"""The configuration tree, as package data of llamatrain.conf."""
