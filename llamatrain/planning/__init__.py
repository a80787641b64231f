"""What a run will take, before anything is spent: memory, time, money, energy. No torch."""
