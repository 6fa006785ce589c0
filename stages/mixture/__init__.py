"""The Mixture of Feature Experts: model, groups of classes, Dynamic-β Mixup, refined features."""
