import petalfl
def test_x(): print(petalfl.__file__); assert petalfl.__file__
