"""Pictures: blocks as graphs, attention over images, learning curves, searches (extra ``viz``).

Figures are made with matplotlib's object-oriented interface, so nothing here needs a display, touches pyplot's global
state or changes the reader's settings: ``plot_attention(model, images).savefig('attention.png')``.
"""

from .attention import capture_gates, plot_attention, plot_attention_maps
from .comparison import plot_comparison
from .confusion import plot_confusion
from .curves import plot_learning_curves
from .drawing import draw_block
from .images import read_images
from .search import plot_logits
from .style import check_picture, missing_matplotlib, network_color, save_figure
from .trionet import draw_architecture, plot_front

__all__ = [
    'capture_gates',
    'check_picture',
    'draw_architecture',
    'draw_block',
    'missing_matplotlib',
    'network_color',
    'plot_attention',
    'plot_attention_maps',
    'plot_comparison',
    'plot_confusion',
    'plot_front',
    'plot_learning_curves',
    'plot_logits',
    'read_images',
    'save_figure',
]
