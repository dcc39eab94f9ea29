"""Pictures as discrete codes, as plain maths: quantisers, and how tokens are drawn."""
