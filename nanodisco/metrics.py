"""Metrics: closed formulas that compare pictures. No networks.

Pictures are uint8 or float (B, H, W, 3) in 0..255.
"""
import numpy as np
from scipy.ndimage import uniform_filter

GREY = (0.299, 0.587, 0.114)
WINDOW = 7                             # of SSIM, pixels


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """20 log10(255 / sqrt(mean squared error)), in decibels; 100 for equal pictures.   -> (B,)"""
    error = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    return np.where(error > 0, 20 * np.log10(255 / np.sqrt(np.maximum(error, 1e-12))), 100.0)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of the grey pictures (Wang et al. 2004), as scikit-image has it.   -> (B,)

    Windows of 7 x 7, all alike; sample covariances; the border where a window would not fit is left out.
    """
    a, b = ((x.astype(np.float64) @ GREY) for x in (a, b))

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, size=(1, WINDOW, WINDOW))
    count, k1, k2 = WINDOW ** 2, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    unbiased, a_mean, b_mean = count / (count - 1), mean(a), mean(b)
    a_var, b_var = unbiased * (mean(a * a) - a_mean ** 2), unbiased * (mean(b * b) - b_mean ** 2)
    both = unbiased * (mean(a * b) - a_mean * b_mean)
    found = ((2 * a_mean * b_mean + k1) * (2 * both + k2)
             / ((a_mean ** 2 + b_mean ** 2 + k1) * (a_var + b_var + k2)))
    edge = WINDOW // 2
    return found[:, edge:-edge, edge:-edge].mean((1, 2))
