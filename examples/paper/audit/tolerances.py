"""The numbers that decide the checks.

An adversarially trained ReLU network without a gate must pass with them, and networks that mask must not.
"""

# largest differences that pass, as shares of the images
ADDS = 0.02  # by twice the steps, or by a gradient that goes around the gate
SETTING = 0.03  # by ten restarts, or by another step size
LOSS = 0.05  # by another loss, AutoAttack, all together: a few points stronger on any network
ONLY = 0.01  # broken by gradient-free attacks alone; right at the largest eps; without a right gradient

RISE = 0.10  # of the loss in the second half of the steps, as a share of that in the first
WRONG = 0.05  # relative error of the derivative along a direction: more is a wrong gradient

# along a way of the length of eps
ASTRAY = 0.30  # relative error of the gradient's sum: more, at half of the images, is a wrong gradient
JUMP = 0.50  # the same at one image: more is a jump
JUMPS = 0.10  # share of the images that may meet one under attack

# a hard mask
SATURATED = 0.50  # share of a site's gate near 0 or 1 at one image: more is a hard mask
RATIO = 0.10  # of ReLU's gradient norm at one image: less is a hard mask
HARD = 0.05  # share of the images that may have a hard mask at a site
