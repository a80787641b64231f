"""Does every way of spreading a run give the same run?"""
