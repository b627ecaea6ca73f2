"""The words of the house: pure data, standard library only. Every room may import it; it imports none."""
